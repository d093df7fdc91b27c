"""ddfast.methods"""
