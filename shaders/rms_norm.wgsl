// uses: reduce, norm
// `ops::RmsNorm`: a workgroup for each row. Rows gathered from nothing are of zeros.

struct Params {
    rows: u32,
    width: u32,
    has_norm: u32,
    has_gather: u32,
    first: u32,
    // Rows of the input.
    inputs: u32,
    eps: f32,
    // Whether the rows are added to the output, and do not overwrite it.
    add: u32,
}
var<immediate> p: Params;

@group(0) @binding(0) var<storage, read> input: array<f32>;
@group(0) @binding(1) var<storage, read> gain: array<f32>;
@group(0) @binding(2) var<storage, read> gather: array<u32>;
@group(0) @binding(3) var<storage, read_write> output: array<f32>;

fn row_value(row: u32, i: u32) -> f32 {
    return input[row * p.width + i];
}

fn row_gain(i: u32) -> f32 {
    return gain[i];
}

@compute @workgroup_size(256)
fn main(thread: Thread) {
    let row = flat_group(thread);
    if (row >= p.rows) {
        return;
    }
    var source = row;
    if (p.has_gather != 0u) {
        source = gather[p.first + row];
    }
    let known = source < p.inputs;
    // All threads take part in the sum, whether or not there is a row.
    let inverse = row_inverse(select(0u, source, known), thread);
    for (var i = thread.index; i < p.width; i += WORKGROUP) {
        let normed = select(0.0, row_normed(select(0u, source, known), i, inverse), known);
        let at = row * p.width + i;
        output[at] = select(normed, output[at] + normed, p.add != 0u);
    }
}
