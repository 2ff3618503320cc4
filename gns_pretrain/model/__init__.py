"""Llama 3 as a plain nn.Module, its loss, and the way to and from transformers' format."""

from gns_pretrain.model.roles import Role, parameter_roles

__all__ = ["Role", "parameter_roles"]
