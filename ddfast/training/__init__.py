"""ddfast.training"""
