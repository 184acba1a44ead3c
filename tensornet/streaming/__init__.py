"""Work on single stored weights, to be shared among processes: read, decompose, write.

A model is compressed one weight after the other, by workers that know nothing of the model. So nothing here
needs the library that the model comes from, and a worker is up as soon as it has imported torch.
"""

from tensornet.io.atomic import Written
from tensornet.io.safetensors_files import (
    ShardTask,
    Slice,
    load_slice,
    read_header,
    write_shard,
    write_tensors,
)
from tensornet.streaming.pool import WorkerError, run_tasks
from tensornet.streaming.stored_matrix import StoredMatrix
from tensornet.streaming.worker import Piece, PieceTask, Use, compress_piece, copy_matrix

__all__ = [
    "Piece",
    "PieceTask",
    "ShardTask",
    "Slice",
    "StoredMatrix",
    "Use",
    "WorkerError",
    "Written",
    "compress_piece",
    "copy_matrix",
    "load_slice",
    "read_header",
    "run_tasks",
    "write_shard",
    "write_tensors",
]
