from sppo import SPPO, SPPOConfig


def test_advantage_is_outcome_minus_value():
    algorithm = SPPO(SPPOConfig(output_dir="unused", use_cpu=True, epsilon=0.1, epsilon_high=0.3, beta=0.5))
    assert algorithm.advantages([1.0, 0.0], [0.25, 0.5], all_equal=False) == [0.75, -0.5]
    assert algorithm.advantages([1.0, 1.0], [0.25, 0.5], all_equal=True) == [0.0, 0.0]
    assert algorithm.loss_arguments["clip_low"] == 0.1
    assert algorithm.loss_arguments["clip_high"] == 0.3
    assert algorithm.loss_arguments["kl_coef"] == 0.5
