"""Typed configuration: sections, loading, cross-section checks, help. Pure; imports no torch."""
