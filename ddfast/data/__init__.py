"""ddfast.data"""
