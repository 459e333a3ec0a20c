"""Facts that must hold after every step, whatever the policy, the inputs and their order."""
