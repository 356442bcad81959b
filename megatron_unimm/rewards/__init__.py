"""What pictures are worth: the numbers that reinforcement learning raises.

``reward.py`` says what a reward is, ``registry.py`` builds those that a recipe names.
"""
