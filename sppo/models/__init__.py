"""Policy and critic: the models that a run trains: construction, packed forward, LoRA, FSDP."""
