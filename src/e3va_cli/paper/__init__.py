"""The paper's published figures, its claims, and how results compare with them."""
