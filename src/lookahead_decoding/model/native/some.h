/* Fewer than sixteen numbers, where the instructions have no masks. */
/* The first lanes, and less than every number in the others. */
INLINE V load_some(const float *p, int lanes) {
    float numbers[16];
    for (int i = 0; i < 16; i++) numbers[i] = i < lanes ? p[i] : -INFINITY;
    return load(numbers);
}

INLINE void store_some(float *p, V x, int lanes) {
    float numbers[16];
    store(numbers, x);
    memcpy(p, numbers, (size_t)lanes * sizeof(float));
}
