"""Names of the figures of an evaluation."""

NAMES = ("accuracy", "many", "medium", "few", "head", "middle", "tail", "ece")
DIVERSITY = ("class_std", "group_std_sum", "kl", "disagreement", "ensemble_gain")
