"""Work on single stored weights, to be shared among processes: read, decompose, write.

A model is compressed one weight after the other, by workers that know nothing of the model. So nothing here
needs the library that the model comes from, and a worker is up as soon as it has imported torch.
"""

from tensornet.pieces.header import Slice, load_slice, read_header
from tensornet.pieces.matrix import StoredMatrix
from tensornet.pieces.piece import Piece, PieceTask, Use, compress_piece, copy_matrix
from tensornet.pieces.pool import WorkerError, run_tasks
from tensornet.pieces.writer import ShardTask, Written, write_shard, write_tensors

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
