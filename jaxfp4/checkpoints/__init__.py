"""Layer 4: NVFP4 checkpoints as files, in the formats of Model-Optimizer and compressed-tensors. Knows no model."""

from jaxfp4.checkpoints.export import export_checkpoint as export_checkpoint
from jaxfp4.checkpoints.export import refuse_unservable as refuse_unservable
from jaxfp4.checkpoints.load import load_checkpoint as load_checkpoint
from jaxfp4.checkpoints.names import TensorName as TensorName
from jaxfp4.checkpoints.orbax_store import Saved as Saved
from jaxfp4.checkpoints.orbax_store import restore as restore
from jaxfp4.checkpoints.orbax_store import save as save
from jaxfp4.checkpoints.safetensors_file import SafetensorsFile as SafetensorsFile
from jaxfp4.checkpoints.safetensors_file import open_checkpoint as open_checkpoint
from jaxfp4.checkpoints.verification import Finding as Finding
from jaxfp4.checkpoints.verification import Severity as Severity
from jaxfp4.checkpoints.verification import verify_checkpoint as verify_checkpoint
