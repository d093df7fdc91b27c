"""ddfast.report"""
