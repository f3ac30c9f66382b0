"""The mathematics of sparsification: tensors in, tensors out.

Reading order: how many stay and which (`mask`) -> a score for every weight (`magnitude`, `wanda`) -> what those that
stay take over, on any mask (`least_squares`) or with a mask of its own (`sparsegpt`, `admm`) -> what it cost
(`reconstruction`) -> how much of every layer goes (`allocation`).
"""
