"""Configuration of ArceeKda models."""

from transformers import PretrainedConfig


class ArceeKdaConfig(PretrainedConfig):
    model_type = "arcee_kda"
