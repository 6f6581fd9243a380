"""The paper's published results and claims, and their comparison with ours."""
