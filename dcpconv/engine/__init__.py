"""Carries out any plan: reads boxes, copies, casts and multiplies out, and publishes the result.

It knows outlines and fills, but neither formats nor families.
"""
