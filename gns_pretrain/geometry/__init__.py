"""Directions, square roots and orthogonalisation of matrices; no collectives, no configuration."""
