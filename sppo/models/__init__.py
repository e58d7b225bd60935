"""The models that a run trains, policy and critic: construction, packed forward, LoRA, FSDP."""
