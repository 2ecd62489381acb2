
// Reductions over the threads of a workgroup; all of them get the result, and all must call.
//
// A tree over the threads' numbers, neighbours first. The lower levels run within subgroups where
// there are any, and the result has the same bits without them.

var<workgroup> reduce_bits: array<u32, WORKGROUP>;

fn reduce_sum_f32(x: f32, thread: Thread) -> f32 {
    let width = subgroup_width(thread);
    let sum = subgroup_sum_f32(x, thread);
    if (thread.index % width == 0u) {
        reduce_bits[thread.index / width] = bitcast<u32>(sum);
    }
    workgroupBarrier();
    for (var distance = 1u; distance < WORKGROUP / width; distance <<= 1u) {
        let first = thread.index * 2u * distance;
        if (first < WORKGROUP / width) {
            let left = bitcast<f32>(reduce_bits[first]);
            let right = bitcast<f32>(reduce_bits[first + distance]);
            reduce_bits[first] = bitcast<u32>(left + right);
        }
        workgroupBarrier();
    }
    let result = bitcast<f32>(reduce_bits[0]);
    workgroupBarrier();
    return result;
}

fn reduce_sum_i32(x: i32, thread: Thread) -> i32 {
    let width = subgroup_width(thread);
    let sum = subgroup_sum_i32(x, thread);
    if (thread.index % width == 0u) {
        reduce_bits[thread.index / width] = bitcast<u32>(sum);
    }
    workgroupBarrier();
    for (var distance = 1u; distance < WORKGROUP / width; distance <<= 1u) {
        let first = thread.index * 2u * distance;
        if (first < WORKGROUP / width) {
            reduce_bits[first] += reduce_bits[first + distance];
        }
        workgroupBarrier();
    }
    let result = bitcast<i32>(reduce_bits[0]);
    workgroupBarrier();
    return result;
}

fn reduce_max_u32(x: u32, thread: Thread) -> u32 {
    let width = subgroup_width(thread);
    let most = subgroup_max_u32(x, thread);
    if (thread.index % width == 0u) {
        reduce_bits[thread.index / width] = most;
    }
    workgroupBarrier();
    for (var distance = 1u; distance < WORKGROUP / width; distance <<= 1u) {
        let first = thread.index * 2u * distance;
        if (first < WORKGROUP / width) {
            reduce_bits[first] = max(reduce_bits[first], reduce_bits[first + distance]);
        }
        workgroupBarrier();
    }
    let result = reduce_bits[0];
    workgroupBarrier();
    return result;
}
