"""Policy and critic: the models that a run trains, and what is done to them."""
