"""What serving engines would make of an NVFP4 checkpoint."""

from jaxfp4.checkpoints.verification.findings import Finding as Finding
from jaxfp4.checkpoints.verification.findings import Severity as Severity
from jaxfp4.checkpoints.verification.verify import verify_checkpoint as verify_checkpoint
