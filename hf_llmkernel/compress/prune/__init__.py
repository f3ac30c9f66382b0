"""The mathematics of structured pruning: tensors in, tensors out.

Feed-forward neurons and attention heads are one problem. Both are groups of columns of the linear that sums them up,
down_proj or o_proj; a neuron owns one column, head h of dimension D owns columns h·D to (h+1)·D.

Reading order: a score for every column (`magnitude`, `wanda`, `flap`, `minitron`, `obs`; a new one is a new file) ->
how many stay and which (`width`, `heads`) -> what those that stay take over (`compensation`).
"""
