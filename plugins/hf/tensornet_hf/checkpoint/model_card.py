"""The model card of a saved folder."""

import os
from pathlib import Path

CARD = "README.md"

_TEXT = """\
---
library_name: transformers
tags:
- tensornet
- tensor-network
---

# Layers of this model are made of cores

`import tensornet_hf` first: without it, transformers does not know the quantization type `tensornet`, and
refuses the folder because of the empty tensors in place of dense weights.

```python
# pip install 'tensornet-torch[hf]'
import tensornet_hf

model = tensornet_hf.load("path/of/this/folder")
```

`AutoModel...from_pretrained` works as well, after the import. The class is `{architecture}`. Which layers are
made of cores, and of which, is said in `config.json` under `quantization_config`.

`tensornet decompress` makes an ordinary model of it again.
"""


def write_card(folder: str | os.PathLike[str], architecture: str) -> None:
    """Write `README.md` into a model folder, unless there is one."""
    card = Path(folder) / CARD
    if (card.parent / "config.json").is_file() and not card.exists():
        card.write_text(_TEXT.format(architecture=architecture), encoding="utf-8")
