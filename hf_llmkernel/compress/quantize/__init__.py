"""Integers in groups that share a scale.

Reading order: the values a group can have (`grid`) -> weights on it without data (`hqq`), with it column by column
(`gptq`), and again (`coordinate_descent`) -> columns scaled before (`fold`) -> the stage that offers them (`stage`).
"""
