//! What an API server would say of a hand-written object. Ours takes what it can read; but whoever writes
//! `ready: "false"` or `nodeport:` should hear of it.

use k8s_openapi::api::core::v1::{Pod, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

/// What is wrong with an object of a kind that we follow: a field of the wrong type, or fields that the
/// API does not know.
pub fn complaints(kind: &str, object: &Value) -> Vec<String> {
    match kind {
        "Service" => check::<Service>(object),
        "EndpointSlice" => check::<EndpointSlice>(object),
        "Pod" => check::<Pod>(object),
        _ => Vec::new(),
    }
}

fn check<T: DeserializeOwned + Serialize>(object: &Value) -> Vec<String> {
    let read: Result<T, _> = serde_path_to_error::deserialize(object);
    match read.map(|object| serde_json::to_value(&object)) {
        Err(error) => vec![format!("{}: {}", error.path(), error.inner())],
        // These types always are JSON.
        Ok(Err(error)) => vec![error.to_string()],
        Ok(Ok(known)) => {
            let unknown = unknown_fields(object, &known);
            unknown.iter().map(|field| format!("{field}: no such field")).collect()
        }
    }
}

/// The fields of an object that are lost on the way through its type: those that it does not know.
pub fn unknown_fields(given: &Value, known: &Value) -> Vec<String> {
    let mut found = Vec::new();
    compare("", given, known, &mut found);
    found
}

fn compare(path: &str, given: &Value, known: &Value, found: &mut Vec<String>) {
    match (given, known) {
        (Value::Object(given), Value::Object(known)) => {
            for (name, value) in given.iter().filter(|(_, value)| !value.is_null()) {
                let path = if path.is_empty() { name.clone() } else { format!("{path}.{name}") };
                match known.get(name) {
                    Some(known) => compare(&path, value, known, found),
                    None => found.push(path),
                }
            }
        }
        (Value::Array(given), Value::Array(known)) => {
            for (position, (given, known)) in given.iter().zip(known).enumerate() {
                compare(&format!("{path}[{position}]"), given, known, found);
            }
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn wrong_types_and_unknown_fields_are_named() {
        let good = json!({
            "apiVersion": "v1", "kind": "Service", "metadata": {"name": "web", "labels": null},
            "spec": {"clusterIP": "10.96.0.1", "ports": [{"port": 80, "targetPort": "http"}]},
        });
        assert_eq!(complaints("Service", &good), [""; 0]);
        let mut misspelt = good.clone();
        misspelt["spec"]["clusterIp"] = "10.96.0.2".into();
        misspelt["spec"]["ports"][0]["nodeport"] = 30_000.into();
        let told = complaints("Service", &misspelt);
        assert_eq!(
            told,
            ["spec.clusterIp: no such field", "spec.ports[0].nodeport: no such field"]
        );
        let slice = json!({
            "addressType": "IPv4", "metadata": {},
            "endpoints": [{"addresses": ["10.0.0.1"], "conditions": {"ready": "false"}}],
        });
        let told = complaints("EndpointSlice", &slice);
        assert!(told[0].starts_with("endpoints[0].conditions.ready: invalid type"), "{told:?}");
        assert_eq!(complaints("ConfigMap", &json!({"anything": 1})), [""; 0]);
    }
}
