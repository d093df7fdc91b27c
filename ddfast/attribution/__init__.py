"""ddfast.attribution"""
