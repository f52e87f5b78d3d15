"""Plain timm models: created by name, filled with weights of any source, sized for images, their head found.

Here belongs what knows how timm makes and describes a model. What happens inside one once a method stands in it
belongs to `core`.
"""
