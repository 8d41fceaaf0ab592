"""The stages of the recipe, each alone or as a step of a plan."""
