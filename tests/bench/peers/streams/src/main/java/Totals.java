import java.util.Properties;
import org.apache.kafka.common.serialization.Serdes;
import org.apache.kafka.common.utils.Bytes;
import org.apache.kafka.streams.KafkaStreams;
import org.apache.kafka.streams.StreamsBuilder;
import org.apache.kafka.streams.errors.StreamsUncaughtExceptionHandler.StreamThreadExceptionResponse;
import org.apache.kafka.streams.kstream.Consumed;
import org.apache.kafka.streams.kstream.Materialized;
import org.apache.kafka.streams.state.KeyValueStore;

/**
 * Adds up deltas by key in a persistent (RocksDB) store with its changelog; nothing else.
 *
 * <p>Arguments: topic, then settings as NAME=VALUE. Prints "ready" when all its stores are restored and it may process.
 */
public final class Totals {
    private Totals() {}

    public static void main(String[] arguments) {
        Properties settings = new Properties();
        for (int i = 1; i < arguments.length; i++) {
            String[] pair = arguments[i].split("=", 2);
            settings.put(pair[0], pair[1]);
        }
        StreamsBuilder builder = new StreamsBuilder();
        Materialized<byte[], Long, KeyValueStore<Bytes, byte[]>> totals = Materialized.as("totals");
        builder.stream(arguments[0], Consumed.with(Serdes.ByteArray(), Serdes.Long()))
            .groupByKey()
            .reduce(Long::sum, totals.withKeySerde(Serdes.ByteArray()).withValueSerde(Serdes.Long()));
        KafkaStreams streams = new KafkaStreams(builder.build(settings), settings);
        streams.setStateListener((now, before) -> {
            if (now == KafkaStreams.State.RUNNING) {
                System.out.println("ready");
            }
        });
        streams.setUncaughtExceptionHandler(error -> {
            error.printStackTrace();
            Runtime.getRuntime().halt(1);
            return StreamThreadExceptionResponse.SHUTDOWN_CLIENT;
        });
        Runtime.getRuntime().addShutdownHook(new Thread(streams::close));
        streams.start();
    }
}
