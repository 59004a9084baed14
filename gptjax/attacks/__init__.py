"""How far a classifier's answers stand up to small changes of its texts, after TextAttack (Morris et al. 2020); no jax.

words.py splits a text into words; perturbations.py changes one; constraints.py says what may change; search.py looks for a change
of the answer; recipes.py names whole attacks; attack.py runs one; summary.py counts; augment.py makes training data.
"""
