"""The zoo: every sequence architecture as a first-class Hugging Face model. Importing it registers them all."""

from zoo.cache import detach_state, load_state, save_state
from zoo.config import ZooConfig
from zoo.convert import export_checkpoint, import_checkpoint
from zoo.heads import ZooForCausalLM, heads_of
from zoo.inspection import KernelUse, ModelSummary, kernel_report, state_bytes, summarize
from zoo.mixer import AuxiliaryLoss, Mixer, RecurrentMixer, Tokens
from zoo.modeling import Block, ZooModel
from zoo.registry import Plugin, create_config, create_model, list_models, load_plugins

__version__ = "0.1.0"

__all__ = [
    "AuxiliaryLoss",
    "Block",
    "KernelUse",
    "Mixer",
    "ModelSummary",
    "Plugin",
    "RecurrentMixer",
    "Tokens",
    "ZooConfig",
    "ZooForCausalLM",
    "ZooModel",
    "create_config",
    "create_model",
    "detach_state",
    "export_checkpoint",
    "heads_of",
    "import_checkpoint",
    "kernel_report",
    "list_models",
    "load_state",
    "save_state",
    "state_bytes",
    "summarize",
]

load_plugins()
