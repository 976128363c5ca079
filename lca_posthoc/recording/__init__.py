"""The training side: every iterate saved as one safetensors file, off the critical path.

`Recorder` fits any loop; `transformers` and `lightning` beside it hold callbacks for these
trainers, which are imported only there.
"""

from .recorder import Recorder as Recorder
