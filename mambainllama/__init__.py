"""mambainllama: pretrained Transformers into fast hybrid Mamba models (The Mamba in the Llama, arXiv 2408.15237)."""
from . import ops
from .answers import answer
from .checkpoint import load, save
from .convert import convert
from .generate import generate
from .model import Model, State, random
from .train import distill, train

__all__ = ["Model", "State", "answer", "convert", "distill", "generate", "load", "ops", "random", "save", "train"]
__version__ = "0.1.0"
