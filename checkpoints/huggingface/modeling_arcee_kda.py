"""ArceeKda models."""

from transformers import PreTrainedModel

from .configuration_arcee_kda import ArceeKdaConfig


class ArceeKdaForCausalLM(PreTrainedModel):
    config_class = ArceeKdaConfig
