// What an engine with llama.cpp's C interface makes of a GGUF file: for tools/check_converted_llama_cpp.py.
//
//   llama_cpp_logits logits MODEL           lines of token ids -> logits of every position, f32, on stdout
//   llama_cpp_logits tokens MODEL           lines of UTF-8 in hexadecimal -> lines of token ids
//   llama_cpp_logits quantize IN OUT FTYPE  the engine's own quantizer; FTYPE is a number of `enum llama_ftype`
//
// Compiles against llama.h of llama.cpp (2026), of ik_llama.cpp and of bitnet.cpp (a fork of 2024): where the name of
// a function changed, whichever the header declares is called.

#include <cstdio>
#include <cstdlib>
#include <iostream>
#include <sstream>
#include <string>
#include <vector>

#include "llama.h"

[[noreturn]] static void fail(const std::string & what) {
    std::cerr << what << "\n";
    std::exit(1);
}

template <class Params> static auto load(const char * path, Params params) {
    if constexpr (requires { llama_model_load_from_file(path, params); }) {
        return llama_model_load_from_file(path, params);
    } else {
        return llama_load_model_from_file(path, params);
    }
}

template <class Model, class Params> static auto open(Model * model, Params params) {
    if constexpr (requires { llama_init_from_model(model, params); }) {
        return llama_init_from_model(model, params);
    } else {
        return llama_new_context_with_model(model, params);
    }
}

template <class Model> static int vocabulary(const Model * model) {
    if constexpr (requires { llama_vocab_n_tokens(llama_model_get_vocab(model)); }) {
        return llama_vocab_n_tokens(llama_model_get_vocab(model));
    } else {
        return llama_n_vocab(model);
    }
}

template <class Model> static int tokenize(const Model * model, const std::string & text, std::vector<llama_token> & ids) {
    const char * bytes = text.data();
    const int32_t size = text.size(), room = ids.size();
    if constexpr (requires { llama_tokenize(model, bytes, size, ids.data(), room, true, true); }) {
        return llama_tokenize(model, bytes, size, ids.data(), room, true, true);
    } else {
        return llama_tokenize(llama_model_get_vocab(model), bytes, size, ids.data(), room, true, true);
    }
}

// No flash attention, whose order of sums is another; the KV cache is f16, the one type that all of them take without.
template <class Params> static Params plain(Params params) {
    params.n_ctx = params.n_batch = params.n_ubatch = 512;
    params.n_threads = params.n_threads_batch = 2;
    if constexpr (requires { params.flash_attn = false; }) {
        params.flash_attn = false;
    } else {
        params.flash_attn_type = static_cast<decltype(params.flash_attn_type)>(0);  // LLAMA_FLASH_ATTN_TYPE_DISABLED
    }
    return params;
}

static void logits(llama_model * model, const std::vector<llama_token> & ids) {
    llama_context * context = open(model, plain(llama_context_default_params()));
    if (!context) {
        fail("no context");
    }
    llama_batch batch = llama_batch_init(ids.size(), 0, 1);
    batch.n_tokens = ids.size();
    for (size_t i = 0; i < ids.size(); i++) {
        batch.token[i] = ids[i];
        batch.pos[i] = i;
        batch.n_seq_id[i] = 1;
        batch.seq_id[i][0] = 0;
        batch.logits[i] = 1;
    }
    if (llama_decode(context, batch) != 0) {
        fail("llama_decode failed");
    }
    for (size_t i = 0; i < ids.size(); i++) {
        std::fwrite(llama_get_logits_ith(context, i), sizeof(float), vocabulary(model), stdout);
    }
    llama_batch_free(batch);
    llama_free(context);
}

static std::string from_hex(const std::string & line) {
    std::string text;
    for (size_t i = 0; i + 1 < line.size(); i += 2) {
        text += static_cast<char>(std::stoi(line.substr(i, 2), nullptr, 16));
    }
    return text;
}

int main(int count, char ** arguments) {
    const std::string mode = count > 1 ? arguments[1] : "";
    llama_backend_init();
    if (mode == "quantize" && count == 5) {
        llama_model_quantize_params params = llama_model_quantize_default_params();
        params.ftype = static_cast<llama_ftype>(std::atoi(arguments[4]));
        params.allow_requantize = true;
        // Only the ternary matrices are of interest.
        params.token_embedding_type = params.output_tensor_type = GGML_TYPE_F16;
        return llama_model_quantize(arguments[2], arguments[3], &params) == 0 ? 0 : 1;
    }
    if ((mode != "logits" && mode != "tokens") || count != 3) {
        fail("usage: logits MODEL | tokens MODEL | quantize IN OUT FTYPE");
    }
    llama_model * model = load(arguments[2], llama_model_default_params());
    if (!model) {
        fail("the engine does not load the file");
    }
    for (std::string line; std::getline(std::cin, line);) {
        if (mode == "logits") {
            std::istringstream words(line);
            std::vector<llama_token> ids;
            for (llama_token id; words >> id;) {
                ids.push_back(id);
            }
            logits(model, ids);
        } else {
            const std::string text = from_hex(line);
            std::vector<llama_token> ids(text.size() + 16);
            ids.resize(tokenize(model, text, ids));
            for (llama_token id : ids) {
                std::cout << id << ' ';
            }
            std::cout << "\n";
        }
    }
}
