"""Recipes for libraries that have a head and a loss of their own."""
