// Streams, events, captures and graphs.
//
// A stream runs its work when somebody waits for it, or a piece of it for each query; a host that
// reads a result without a wait sees what was there before. Work of the null stream runs at once,
// after that of all blocking streams.
#include "barriers.h"
#include "driver.h"

std::shared_ptr<Stream> find_stream(Context& context, CUstream handle) {
    // 0, and the names of the null stream: CU_STREAM_LEGACY, CU_STREAM_PER_THREAD.
    if (reinterpret_cast<size_t>(handle) <= 2) return context.null_stream;
    return find(context.streams, handle);
}

// Runs the first piece of a stream's work. After it the lock may have been released for a while.
static void run_one(Hold& hold, const std::shared_ptr<Stream>& stream) {
    if (stream->busy) {
        changed.wait(hold, [&] { return !stream->busy; });
        return;
    }
    if (stream->work.empty()) return;
    Work work = std::move(stream->work.front());
    stream->work.pop_front();
    stream->busy = true;
    if (work.before) run_until(hold, work.before, work.target);
    Context& context = *stream->context;
    // A broken context runs no more, and its work counts as done.
    if (work.run && context.error == SUCCESS) {
        hold.unlock();
        const Outcome outcome = [&] {
            const auto beside = work.launch ? std::shared_lock<std::shared_mutex>() : beside_barriers();
            return work.run();
        }();
        hold.lock();
        if (outcome.result != SUCCESS) break_context(context, outcome);
    }
    if (work.record && work.record->generation == work.generation) {
        work.record->time = std::chrono::steady_clock::now();
        work.record->stamped = true;
    }
    stream->done++;
    stream->busy = false;
    changed.notify_all();
}

void run_until(Hold& hold, const std::shared_ptr<Stream>& stream, uint64_t target) {
    while (stream->done < target && (stream->busy || !stream->work.empty())) run_one(hold, stream);
}

void run_all(Hold& hold, Context& context, bool blocking_only) {
    std::vector<std::shared_ptr<Stream>> streams;
    for (auto& [handle, stream] : context.streams) {
        if (stream->blocking || !blocking_only) streams.push_back(stream);
    }
    for (auto& stream : streams) run_until(hold, stream, stream->enqueued);
}

Result enqueue(Hold& hold, Context& context, const std::shared_ptr<Stream>& stream, Work work) {
    if (stream->capture) {
        if (!stream->capture->valid) return CAPTURE_INVALIDATED;
        stream->capture->graph->nodes.push_back(std::move(work));
        return SUCCESS;
    }
    if (stream == context.null_stream) {
        for (auto& [handle, other] : context.streams) {
            if (other->capture && other->blocking) {
                other->capture->valid = false;
                return CAPTURE_IMPLICIT;
            }
        }
        run_all(hold, context, true);
    }
    stream->work.push_back(std::move(work));
    stream->enqueued++;
    if (stream == context.null_stream || settings().eager) run_until(hold, stream, stream->enqueued);
    return SUCCESS;
}

Result not_in_capture(Context& context) {
    Result result = SUCCESS;
    for (auto& [handle, stream] : context.streams) {
        const auto& capture = stream->capture;
        if (!capture || capture->mode == 2) continue;
        if (capture->mode == 1 && capture->thread != std::this_thread::get_id()) continue;
        capture->valid = false;
        result = CAPTURE_UNSUPPORTED;
    }
    return result;
}

// --- streams

EXPORT Result cuStreamCreateWithPriority(CUstream* result, unsigned flags, int) {
    IN_CONTEXT(context);
    auto stream = std::make_shared<Stream>();
    stream->context = context.get();
    stream->blocking = !(flags & 1);
    context->streams[stream.get()] = stream;
    *result = stream.get();
    return SUCCESS;
}
EXPORT Result cuStreamCreate(CUstream* result, unsigned flags) { return cuStreamCreateWithPriority(result, flags, 0); }
EXPORT Result cuStreamDestroy_v2(CUstream handle) {
    IN_CONTEXT(context);
    auto stream = find(context->streams, handle);
    if (!stream) return INVALID_HANDLE;
    run_until(hold, stream, stream->enqueued);
    context->streams.erase(handle);
    return context->error;
}
EXPORT Result cuStreamSynchronize(CUstream handle) {
    IN_CONTEXT(context);
    auto stream = find_stream(*context, handle);
    if (!stream) return INVALID_HANDLE;
    if (stream->capture) {
        stream->capture->valid = false;
        return CAPTURE_UNSUPPORTED;
    }
    if (stream == context->null_stream) run_all(hold, *context, true);
    run_until(hold, stream, stream->enqueued);
    return context->error;
}
EXPORT Result cuStreamQuery(CUstream handle) {
    IN_CONTEXT(context);
    auto stream = find_stream(*context, handle);
    if (!stream) return INVALID_HANDLE;
    if (stream->capture) {
        stream->capture->valid = false;
        return CAPTURE_UNSUPPORTED;
    }
    if (stream->done == stream->enqueued) return SUCCESS;
    run_one(hold, stream);
    return context->error ? context->error : NOT_READY;
}
EXPORT Result cuStreamGetCtx(CUstream handle, CUcontext* result) {
    IN_CONTEXT(context);
    if (!find_stream(*context, handle)) return INVALID_HANDLE;
    *result = context.get();
    return SUCCESS;
}
EXPORT Result cuStreamGetFlags(CUstream handle, unsigned* flags) {
    IN_CONTEXT(context);
    auto stream = find_stream(*context, handle);
    if (!stream) return INVALID_HANDLE;
    *flags = !stream->blocking;
    return SUCCESS;
}
EXPORT Result cuLaunchHostFunc(CUstream handle, void (*call)(void*), void* data) {
    IN_CONTEXT(context);
    auto stream = find_stream(*context, handle);
    if (!stream) return INVALID_HANDLE;
    Work work;
    work.run = [=] { return call(data), Outcome(); };
    return enqueue(hold, *context, stream, std::move(work));
}

// --- events

EXPORT Result cuEventCreate(CUevent* result, unsigned flags) {
    IN_CONTEXT(context);
    auto event = std::make_shared<Event>();
    event->context = context.get();
    event->timing = !(flags & 2);
    context->events[event.get()] = event;
    *result = event.get();
    return SUCCESS;
}
EXPORT Result cuEventDestroy_v2(CUevent handle) {
    IN_CONTEXT(context);
    return context->events.erase(handle) ? SUCCESS : INVALID_HANDLE;
}
EXPORT Result cuEventRecord(CUevent handle, CUstream stream_handle) {
    IN_CONTEXT(context);
    auto event = find(context->events, handle);
    auto stream = find_stream(*context, stream_handle);
    if (!event || !stream) return INVALID_HANDLE;
    if (stream->capture) {
        if (!stream->capture->valid) return CAPTURE_INVALIDATED;
        event->capture = stream->capture;
        return SUCCESS;
    }
    event->capture = nullptr;
    event->stream = stream;
    event->stamped = false;
    event->target = stream->enqueued + 1;
    Work work;
    work.record = event;
    work.generation = ++event->generation;
    return enqueue(hold, *context, stream, std::move(work));
}
EXPORT Result cuEventRecordWithFlags(CUevent event, CUstream stream, unsigned) { return cuEventRecord(event, stream); }
static bool is_done(const Event& event) { return !event.stream || event.stream->done >= event.target; }
EXPORT Result cuEventQuery(CUevent handle) {
    IN_CONTEXT(context);
    auto event = find(context->events, handle);
    if (!event) return INVALID_HANDLE;
    if (event->capture) return CAPTURED_EVENT;
    if (is_done(*event)) return SUCCESS;
    // The work goes on a little between two looks at it.
    run_one(hold, event->stream);
    return context->error ? context->error : NOT_READY;
}
EXPORT Result cuEventSynchronize(CUevent handle) {
    IN_CONTEXT(context);
    auto event = find(context->events, handle);
    if (!event) return INVALID_HANDLE;
    if (event->capture) return CAPTURED_EVENT;
    if (event->stream) run_until(hold, event->stream, event->target);
    return context->error;
}
EXPORT Result cuEventElapsedTime(float* milliseconds, CUevent from_handle, CUevent to_handle) {
    IN_CONTEXT(context);
    auto from = find(context->events, from_handle), to = find(context->events, to_handle);
    if (!from || !to || !from->timing || !to->timing || !from->stream || !to->stream) return INVALID_HANDLE;
    if (!is_done(*from) || !is_done(*to)) return NOT_READY;
    *milliseconds = std::chrono::duration<float, std::milli>(to->time - from->time).count();
    return SUCCESS;
}
EXPORT Result cuEventElapsedTime_v2(float* milliseconds, CUevent from, CUevent to) {
    return cuEventElapsedTime(milliseconds, from, to);
}
EXPORT Result cuStreamWaitEvent(CUstream stream_handle, CUevent handle, unsigned) {
    IN_CONTEXT(context);
    auto event = find(context->events, handle);
    auto stream = find_stream(*context, stream_handle);
    if (!event || !stream) return INVALID_HANDLE;
    if (event->capture) {
        // Draws the stream into the capture, whose nodes run in the order in which they were added.
        if (stream->capture && stream->capture != event->capture) return CAPTURE_INVALIDATED;
        stream->capture = event->capture;
        return SUCCESS;
    }
    if (stream->capture) {
        // Waits for work outside of the capture.
        stream->capture->valid = false;
        return CAPTURE_ISOLATION;
    }
    if (!event->stream || is_done(*event)) return SUCCESS;
    Work work;
    work.before = event->stream;
    work.target = event->target;
    return enqueue(hold, *context, stream, std::move(work));
}

// --- captures and graphs

namespace {
// Graphs belong to no context, until they run.
std::unordered_map<void*, std::shared_ptr<Graph>> graphs, executables;
} // namespace

EXPORT Result cuStreamBeginCapture_v2(CUstream handle, int mode) {
    IN_CONTEXT(context);
    auto stream = find_stream(*context, handle);
    if (!stream) return INVALID_HANDLE;
    if (stream == context->null_stream) return CAPTURE_UNSUPPORTED;
    if (stream->capture) return INVALID_VALUE;
    stream->capture = std::make_shared<Capture>();
    stream->capture->origin = stream.get();
    stream->capture->mode = mode;
    stream->capture->thread = std::this_thread::get_id();
    return SUCCESS;
}
EXPORT Result cuStreamEndCapture(CUstream handle, CUgraph* result) {
    IN_CONTEXT(context);
    *result = nullptr;
    auto stream = find_stream(*context, handle);
    if (!stream) return INVALID_HANDLE;
    auto capture = stream->capture;
    if (!capture) return INVALID_VALUE;
    if (capture->origin != stream.get()) return CAPTURE_UNMATCHED;
    if (capture->mode != 2 && capture->thread != std::this_thread::get_id()) return CAPTURE_WRONG_THREAD;
    for (auto& [other_handle, other] : context->streams) {
        if (other->capture == capture) other->capture = nullptr;
    }
    if (!capture->valid) return CAPTURE_INVALIDATED;
    graphs[capture->graph.get()] = capture->graph;
    *result = capture->graph.get();
    return SUCCESS;
}
EXPORT Result cuStreamIsCapturing(CUstream handle, int* status) {
    IN_CONTEXT(context);
    auto stream = find_stream(*context, handle);
    if (!stream) return INVALID_HANDLE;
    *status = !stream->capture ? 0 : stream->capture->valid ? 1 : 2;
    return SUCCESS;
}
EXPORT Result cuThreadExchangeStreamCaptureMode(int*) { return SUCCESS; }

EXPORT Result cuGraphInstantiateWithFlags(CUgraphExec* result, CUgraph handle, unsigned long long) {
    IN_CONTEXT(context);
    auto graph = find(graphs, handle);
    if (!graph) return INVALID_VALUE;
    auto executable = std::make_shared<Graph>(*graph);
    executables[executable.get()] = executable;
    *result = executable.get();
    return SUCCESS;
}
EXPORT Result cuGraphInstantiateWithParams(CUgraphExec* result, CUgraph graph, void*) {
    return cuGraphInstantiateWithFlags(result, graph, 0);
}
EXPORT Result cuGraphInstantiate_v2(CUgraphExec* result, CUgraph graph, void**, char*, size_t) {
    return cuGraphInstantiateWithFlags(result, graph, 0);
}
EXPORT Result cuGraphInstantiate(CUgraphExec* result, CUgraph graph, void**, char*, size_t) {
    return cuGraphInstantiateWithFlags(result, graph, 0);
}
EXPORT Result cuGraphGetNodes(CUgraph handle, void**, size_t* count) {
    Hold hold(state);
    auto graph = find(graphs, handle);
    if (!graph) return INVALID_VALUE;
    *count = graph->nodes.size();
    return SUCCESS;
}
EXPORT Result cuGraphUpload(CUgraphExec handle, CUstream stream) {
    IN_CONTEXT(context);
    return find(executables, handle) && find_stream(*context, stream) ? SUCCESS : INVALID_VALUE;
}
EXPORT Result cuGraphLaunch(CUgraphExec handle, CUstream stream_handle) {
    IN_CONTEXT(context);
    auto graph = find(executables, handle);
    auto stream = find_stream(*context, stream_handle);
    if (!graph || !stream) return INVALID_VALUE;
    for (const Work& work : graph->nodes) {
        if (Result failed = enqueue(hold, *context, stream, work)) return failed;
    }
    return context->error;
}
EXPORT Result cuGraphExecDestroy(CUgraphExec handle) {
    Hold hold(state);
    return executables.erase(handle) ? SUCCESS : INVALID_VALUE;
}
EXPORT Result cuGraphDestroy(CUgraph handle) {
    Hold hold(state);
    return graphs.erase(handle) ? SUCCESS : INVALID_VALUE;
}
