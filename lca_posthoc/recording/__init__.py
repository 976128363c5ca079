"""Save every iterate during training as one safetensors file, off the critical path.

`Recorder` fits any loop. The modules `transformers` and `lightning` hold callbacks for those
trainers and import them only there.
"""

from .recorder import Recorder as Recorder
