"""The papers' claims as experiments on the generated benchmark; ``laconic evidence`` runs them and writes docs/evidence.md."""
