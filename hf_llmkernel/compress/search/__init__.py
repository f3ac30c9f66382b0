"""Search: of several ways to compress each layer, the mix over all layers that loses least within a budget."""
