"""The mathematics of low-rank factorization: tensors in, tensors out.

Reading order: how large a rank is worth it (`rank`) -> the factors of a weight alone (`svd`) -> the factors for the
inputs that a linear has (`svd_llm`).
"""
