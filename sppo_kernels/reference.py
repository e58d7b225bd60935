"""The definition of every operation, under its public name: plain differentiable PyTorch, float32 or float64."""


__all__ = [
]
