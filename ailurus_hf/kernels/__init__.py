"""Fused kernels (Triton) in the place of the plain operations of `modeling/`, which are their references.

`AILURUS_KERNELS=1` in the environment turns them on, `enable` does so from code. They run on CUDA devices, and on the
CPU in triton's interpreter (`TRITON_INTERPRET=1`); everything else stays with the plain operations.
"""

from .replacements import disable, enable

__all__ = ["disable", "enable"]
