"""From files to what the towers take: pictures to patches, sounds to mel frames, videos to both.

numpy, Pillow and PyAV only; the towers, which need torch, are in model/.
"""
