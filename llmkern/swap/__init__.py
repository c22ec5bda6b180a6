"""Put llmkern's kernels into somebody's model, in place, and take them out again.

A module is swapped by giving it another class, `module.__class__ = llmkern.nn.LayerNorm`: a subclass
of its own that overrides forward.  So it keeps its Parameters, names, hooks and options, and
optimizers, `state_dict`, `deepcopy` and `torch.save` see no difference.  Nothing outside the model is
touched.  `rules.py` has torch's own classes, `found.py` those of others, `hf.py` what Hugging Face models
take as settings; `sdpa.py` replaces one function of torch for the process, when asked.
"""

from .restore import restore_, swapped
from .sdpa import disable_sdpa, enable_sdpa
from .swap import swap_

__all__ = ["disable_sdpa", "enable_sdpa", "restore_", "swap_", "swapped"]
