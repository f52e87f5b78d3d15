"""The methods that ship with visgraft, one file each; importing a file registers its method, in this order.

Here belongs what makes one method differ from another, and the channel scores that methods choose by. What all
methods need belongs to `core`; no other room asks which method it has. Rooms above ask here
for a method by its name, so that all are registered then.
"""

from visgraft.methods.sct import SCTConfig as SCTConfig  # isort: skip
from visgraft.methods.alore import ALoREConfig as ALoREConfig  # isort: skip
from visgraft.methods.affine_alore import AffineALoREConfig as AffineALoREConfig  # isort: skip
from visgraft.methods.lora import LoRAConfig as LoRAConfig  # isort: skip
from visgraft.methods.dora import DoRAConfig as DoRAConfig  # isort: skip
from visgraft.methods.adapter import AdapterConfig as AdapterConfig  # isort: skip
from visgraft.methods.adaptformer import AdaptFormerConfig as AdaptFormerConfig  # isort: skip
from visgraft.methods.repadapter import RepAdapterConfig as RepAdapterConfig  # isort: skip
from visgraft.methods.convpass import ConvpassConfig as ConvpassConfig  # isort: skip
from visgraft.methods.fact import FacTConfig as FacTConfig  # isort: skip
from visgraft.methods.arc import ARCConfig as ARCConfig  # isort: skip
from visgraft.methods.ssf import SSFConfig as SSFConfig  # isort: skip
from visgraft.methods.vpt import VPTShallowConfig as VPTShallowConfig  # isort: skip
from visgraft.methods.vpt import VPTDeepConfig as VPTDeepConfig  # isort: skip
from visgraft.methods.bitfit import BitFitConfig as BitFitConfig  # isort: skip
from visgraft.methods.norm import NormConfig as NormConfig  # isort: skip
from visgraft.methods.partial import PartialConfig as PartialConfig  # isort: skip
from visgraft.methods.linear import LinearConfig as LinearConfig  # isort: skip
from visgraft.methods.full import FullConfig as FullConfig  # isort: skip

from visgraft.core.registry import get_method as get_method  # isort: skip
from visgraft.core.registry import list_methods as list_methods  # isort: skip
from visgraft.core.registry import method_names as method_names  # isort: skip

__all__ = [name for name in dir() if name.endswith("Config")]
