"""Appendix E, LoRA: the layer, the linear layer that has one, and the replacement of all linear layers."""

from fastgpt.finetuning.lora import LinearWithLoRA, LinearWithLoRAMerged, LoRALayer, replace_linear_with_lora

__all__ = ["LinearWithLoRA", "LinearWithLoRAMerged", "LoRALayer", "replace_linear_with_lora"]
