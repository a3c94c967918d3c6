"""What a compiled step costs: memory, arithmetic, memory traffic, network.

Everything is read from a program that XLA has really compiled, for this
machine or, without having one, for a slice of TPUs.
"""
