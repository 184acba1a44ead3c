"""Read, decompose and write single stored weights in worker processes.

Workers know nothing of the model that the weights belong to, so they start without its library.
"""

from tensornet.io import (
    ShardTask,
    Slice,
    Written,
    load_slice,
    read_header,
    write_shard,
    write_tensors,
)
from tensornet.streaming.pool import WorkerError, run_tasks
from tensornet.streaming.stored_matrix import StoredMatrix
from tensornet.streaming.worker import (
    Piece,
    PieceTask,
    StackTask,
    Use,
    compress_piece,
    compress_stack,
    copy_matrix,
)

__all__ = [
    "Piece",
    "PieceTask",
    "ShardTask",
    "Slice",
    "StackTask",
    "StoredMatrix",
    "Use",
    "WorkerError",
    "Written",
    "compress_piece",
    "compress_stack",
    "copy_matrix",
    "load_slice",
    "read_header",
    "run_tasks",
    "write_shard",
    "write_tensors",
]
