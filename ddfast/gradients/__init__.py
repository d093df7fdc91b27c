"""ddfast.gradients"""
