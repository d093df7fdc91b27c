"""ddfast.models"""
